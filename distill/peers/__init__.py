"""Programs that run other trainers for comparison, each in an environment of its own; the product never imports them."""
