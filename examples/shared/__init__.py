"""What the examples share: settings, data, modules, and one fit from the dense denoiser to an evaluated ensemble."""
