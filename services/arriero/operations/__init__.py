"""Durable long-running operations: a service's answer to one stage.

Responsibility: accept work once, run it in jobs, retry, resume, publish what
came out, remember all of it across restarts. Does not know what any work is.
"""
