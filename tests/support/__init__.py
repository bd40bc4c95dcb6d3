"""What tests share: tiny bases, stores, carry-ons and runs."""
