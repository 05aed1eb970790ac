"""One file per subcommand; the function has the name of its file."""
