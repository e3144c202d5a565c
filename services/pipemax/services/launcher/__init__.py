"""Starts the processes of one system, keeps them running, and stops them.

`supervisor.py` decides (pure: no processes, no clock), `system.py` carries out.
"""
