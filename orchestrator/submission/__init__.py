"""Jobs on a cluster from outside of it, where only its job server's HTTP port can be reached."""
