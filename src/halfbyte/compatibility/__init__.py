"""What engines are known to lose, refuse or get wrong."""
