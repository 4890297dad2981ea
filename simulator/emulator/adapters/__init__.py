"""Sockets, timers and processes of the emulator; everything they decide with stands one folder up."""
