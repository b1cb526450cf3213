"""What an exported folder with its own code consists of, besides the files of the model itself."""
