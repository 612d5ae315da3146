"""What other libraries have to know of this one: a module each, which nothing imports unasked."""
