"""What a run goes back to: written beside its steps, checked, resharded, kept in a folder or a bucket."""
