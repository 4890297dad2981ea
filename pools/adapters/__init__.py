"""What of pools/ reads files or talks to shared state."""
