"""Methods that solve ODEs. `solvers.ode.integrate` is the entrance to all of them."""
