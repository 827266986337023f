"""Files that lie elsewhere: the hub, buckets, web servers. Read by ranges, never held on this machine's disk."""
