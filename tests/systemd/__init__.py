"""kvstored as a service of a real systemd."""
