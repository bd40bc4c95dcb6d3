"""Make and read stores of a frozen base's hidden states."""
