"""Methods that solve ODEs. `solvers.ode.integrate` is the entry point for all of them."""
