"""The `hf-gr` command, and what the scripts share: arguments, help, console, output folder, trainers."""
