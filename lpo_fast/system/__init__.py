"""The machine below the method: processes, devices, compilation, kernel launches, console and files."""
