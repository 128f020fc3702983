"""Which model, which replica, when; and what to do when one fails."""
