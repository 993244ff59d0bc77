"""A service's life in minutes: random traffic, clients that leave, engines that are killed; then the accounts."""
