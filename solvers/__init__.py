"""The methods of ode.py that use a library (diffrax, SciPy), and the code that all methods share."""
