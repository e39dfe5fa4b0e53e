"""What the reference loop needs around the library: data sets, loaders, nets, recipes, evaluation, report."""
