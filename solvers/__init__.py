"""The methods of ode.py that use a library, and what all methods have in common."""
