"""What engines load of halfbyte by themselves: plugins."""
