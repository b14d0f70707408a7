"""The objectives other than denoising score matching, and the code that all objectives share."""
