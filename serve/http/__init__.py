"""The HTTP interface: routes, middleware, information pages."""
