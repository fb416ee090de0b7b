"""Tickets that train side by side on several devices: who trains what, and how long that takes."""
