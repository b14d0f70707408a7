"""What training can minimise besides denoising score matching, and what all objectives share."""
