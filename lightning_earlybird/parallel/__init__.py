"""Tickets that train side by side: what the ranks of one run share once the world is split."""
