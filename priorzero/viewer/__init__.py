"""A run, or two beside each other, as one HTML page that needs nothing but a browser: what is on it
(`runs.py`, `curves.py`, `findings.py`), how it is put together (`page.py`, `assets/`), and how it
is shown while a run goes on (`server.py`).
"""
