"""What several commands share: options, tables, colours, interrupts."""
