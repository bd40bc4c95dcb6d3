"""Train carry-ons from a store, without the base."""
