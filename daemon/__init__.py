"""The service and its face: processes, clocks, sockets, commands."""
