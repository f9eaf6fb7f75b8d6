"""What bits of a weight are kept, and how they are fitted."""
