"""Tests of the OpenResty side against a real nginx on loopback."""
