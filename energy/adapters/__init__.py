"""What of energy/ reads and writes files or talks to devices."""
