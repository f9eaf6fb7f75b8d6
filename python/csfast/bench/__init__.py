"""What things cost in time, beside what a user would do without csfast."""
