"""Files that describe a cluster: the shipped ones, one that fits a wish, and what is wrong with one before it costs."""
