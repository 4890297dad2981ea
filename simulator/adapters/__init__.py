"""What of simulator/ reads and writes files."""
