"""What `ray job submit` starts: parse, load, launch."""
