"""What the client promises on its own, without a daemon."""
