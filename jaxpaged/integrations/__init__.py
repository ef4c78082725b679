"""Other libraries' weights and trainers. `trees` needs none of them; other modules need the one in their name."""
