"""What touches the clock and the network for the experiments."""
