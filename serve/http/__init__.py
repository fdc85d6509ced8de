"""HTTP interface: routes, middleware, item, catalog and policy information."""
