"""Every field of a configuration, with its meaning and default. Other files state their differences from this one.

Field names are the published ones wherever the published code has the field.
"""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any
"""A ConfigDict, or a part of one, in the signatures that read it; its fields are dynamic."""


def get_config() -> Config:
    config = ConfigDict()
    config.seed = 42  # of everything random: initialisation, data order, noise, probes, samples
    config.training = _training()
    config.data = _data()
    config.model = _model()
    config.optim = _optim()
    config.sampling = _sampling()
    config.eval = _eval()
    config.deq = _deq()
    return config


def _training() -> ConfigDict:
    training = ConfigDict()
    training.sde = "vesde"  # vesde, linearvesde, vpsde, subvpsde
    training.continuous = True  # continuous time; the only choice
    training.smallest_time = 1e-5  # losses and likelihoods use t in [smallest_time, 1]
    training.batch_size = 128  # global, over all devices; published: 128 for orders 1 and 2, 48 for order 3
    training.accumulation_steps = 1  # parts of the batch, one after another: less memory, the same gradient
    training.n_iters = 4_000_001  # the run ends at this step
    training.n_jitted_steps = 1  # steps in one compiled call; raises throughput where steps are short
    training.score_matching_order = 1  # 1, 2 or 3: highest order of denoising score matching in the loss
    training.second_order_weight = 1.0  # of the two second-order terms beside the first-order loss
    training.third_order_weight = 1.0  # of the third-order term
    training.exact_derivatives = False  # orders 2 and 3 exactly, not by a probe; for points of few dimensions
    training.likelihood_weighting = False  # weight the first order by g^2, else by sigma^2
    training.importance_weighting = False  # draw t in proportion to g^2 / sigma^2; with likelihood_weighting
    training.reduce_mean = True  # mean over dimensions, else half the sum; orders 2 and 3 need the mean
    training.log_freq = 100  # steps between records of the losses
    training.eval_freq = 100  # steps between losses on test data
    training.eval_batches = 1  # batches of test data behind each; the same ones, with the same noise, every time
    training.snapshot_freq = 50_000  # steps between checkpoints that are kept for good
    training.snapshot_freq_for_preemption = 10_000  # steps between checkpoints that only serve to go on from
    training.snapshot_sampling = True  # draw a grid of samples with every kept checkpoint
    training.init_from = ""  # start from: a workdir, a step's folder in its checkpoints, or a released file
    # parts of init_from not to take over: any of step (and with it the warm-up), opt, ema; joined by commas
    training.init_reset = ""
    return training


def _data() -> ConfigDict:
    data = ConfigDict()
    data.dataset = "CIFAR10"  # CIFAR10, MNIST, SVHN, ImageNet, CelebA, LSUN, CelebAHQ, FFHQ (sources/catalogue.py);
    # digits; npz, folder: the user's own, at data.path;
    # points of a density: mixture, checkerboard, swissroll, moons (densities.py)
    data.variant = ""  # of ImageNet: old (the papers') or new (image-net.org's of 2021); never comparable
    data.category = ""  # of a data set that has several: LSUN's scene
    data.path = ""  # of npz the file, of folder the folder; of CelebA, LSUN and faces the originals, if there are any
    data.dir = "assets/data"  # where data sets are as --mode=prepare or tfds has made them; and folders' decoded images
    data.archive = ""  # for --mode=prepare: the file as published, or the folder with the files; empty: tfds downloads
    data.archive_sha256 = ""  # accept files of these hashes, joined by commas, instead of the known ones
    data.num_points = 1_000_000  # of points: how many to draw for training, and for testing
    data.num_test_points = 10_000
    data.image_size = 32
    data.num_channels = 3
    data.levels = 256  # grey levels of a channel; bits/dim are those of the discrete image
    data.centered = False  # images in [-1, 1] for the network, else in [0, 1]
    data.random_flip = True  # mirror training images left-right at random
    data.uniform_dequantization = False  # add uniform noise of one level to training images
    return data


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = "ncsnpp"  # ncsnpp: NCSN++ and DDPM++, by the fields below; mlp: for points
    model.sigma_min = 0.01  # VE's smallest and largest noise level
    model.sigma_max = 50.0
    model.beta_min = 0.1  # VP's and sub-VP's noise rate at t = 0 and t = 1
    model.beta_max = 20.0
    model.num_scales = 1000  # steps of the discrete chain that predictor-corrector samplers follow
    model.ema_rate = 0.999  # decay of the averaged parameters that evaluation uses
    model.dropout = 0.1
    model.embedding_type = "fourier"  # of the time: fourier (of ln sigma) or positional (of 999 t)
    model.fourier_scale = 16  # standard deviation of the Fourier frequencies
    model.trainable_embedding = False  # frequencies are fixed; the only choice
    model.conditional = True  # feed the time embedding to the residual blocks
    model.nonlinearity = "swish"  # swish, elu, relu, lrelu
    model.normalization = "GroupNorm"  # the only choice
    model.nf = 128  # channels at full resolution
    model.ch_mult = (1, 2, 2, 2)  # channels of each resolution, in units of nf
    model.num_res_blocks = 4  # residual blocks at each resolution
    model.attn_resolutions = (16,)  # image sizes at which self-attention follows a residual block
    model.attention_type = "ddpm"  # the only choice
    model.resamp_with_conv = True  # convolve when resampling (ddpm blocks)
    model.resblock_type = "biggan"  # biggan or ddpm
    model.fir = True  # resample with a smoothing filter, else by repeating and averaging
    model.fir_kernel = (1, 3, 3, 1)
    model.skip_rescale = True  # divide sums of two branches by sqrt(2)
    model.progressive = "none"  # output pyramid: none, output_skip, residual
    model.progressive_input = "residual"  # input pyramid: none, input_skip, residual
    model.progressive_combine = "sum"  # how the input pyramid joins: sum, cat
    model.init_scale = 0.0  # variance scale of the last layer of each block; 0 means nearly zero
    model.scale_by_sigma = True  # divide the network's output by sigma; exactly the VE models do
    model.conv_size = 3  # the only choice
    model.data_init = False  # data-dependent initialisation; the dequantizer has it, score networks do not
    model.mlp_embedding = 64  # sines and cosines of the time
    model.mlp_time_widths = (128, 128, 128)  # of the layers on the time alone, on the point alone, and on both
    model.mlp_data_widths = (128, 128, 128)
    model.mlp_widths = (512, 512)
    model.remat = False  # recompute each block in the backward pass: less memory, more time
    return model


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.optimizer = "Adam"  # the only choice
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.weight_decay = 0.0  # decoupled, as a multiple of the learning rate
    optim.warmup = 5000  # steps over which the learning rate rises linearly from 0
    optim.grad_clip = 1.0  # largest global norm of a gradient; negative: no limit
    return optim


def _sampling() -> ConfigDict:
    sampling = ConfigDict()
    sampling.method = "pc"  # pc (predictor-corrector), ode (probability flow, adaptive steps), dpm_solver, heun
    sampling.predictor = "reverse_diffusion"  # euler_maruyama, reverse_diffusion, ancestral_sampling, none
    sampling.corrector = "langevin"  # langevin, ald, none
    sampling.num_steps = 0  # predictor steps; 0: model.num_scales
    sampling.n_steps_each = 1  # corrector steps for each predictor step
    sampling.snr = 0.16  # signal-to-noise ratio that sets the corrector's step
    sampling.probability_flow = False  # predictor follows the ODE, not the SDE
    sampling.noise_removal = True  # return the last mean, without its noise
    sampling.smallest_time = 1e-5  # sampling ends at this time
    sampling.ode_solver = "dopri5"  # of the ode sampler: dopri5 (on the devices), scipy (on the host, as published)
    sampling.rtol = 1e-5  # of the ode sampler
    sampling.atol = 1e-5
    sampling.max_nfe = 20  # network evaluations that dpm_solver and heun may spend
    sampling.order = 2  # of dpm_solver: 1, 2, 3
    sampling.eta = 0.0  # of dpm_solver: 0 follows the ODE, 1 the SDE, which VE models need
    sampling.clip_denoised = True  # dpm_solver and heun hold denoised images in the data's range
    sampling.schedule = "auto"  # grid of dpm_solver and heun, uniform in: log_snr, power, time; auto: the method's own
    sampling.schedule_exponent = 7.0  # of power: equal steps in (sigma / alpha)^(1 / exponent)
    sampling.batch_size = 256  # images drawn together, over all devices
    return sampling


def _eval() -> ConfigDict:
    evaluate = ConfigDict()
    evaluate.begin_ckpt = 1  # first and last kept checkpoint to evaluate, counted in units of snapshot_freq;
    evaluate.end_ckpt = 0  # an end below the beginning: the newest checkpoint only
    evaluate.checkpoint = ""  # evaluate this one instead: as training.init_from, a released file for one
    evaluate.ckpt_id = 0  # the checkpoint that a dequantizer is trained for
    evaluate.batch_size = 1024  # images evaluated together, over all devices
    evaluate.enable_loss = False  # mean of the training loss over the test images
    evaluate.enable_bpd = True  # bits/dim of the ODE
    evaluate.enable_sampling = False  # FID, IS and KID of samples
    evaluate.bpd_dataset = "test"  # train or test
    evaluate.num_repeats = 5  # passes over the images, each with new dequantization noise and probes
    evaluate.max_examples = 0  # evaluate only so many images; 0: all
    evaluate.density_grid = 48  # of points in 1 or 2 dimensions: cells a side of the report's density; 0: none
    # adams_log, rk4_log: equal steps in log noise; dopri5_log, scipy_log: adaptive there; dopri5, scipy, rk4: in time.
    # dopri5 and scipy are RK45, on the devices and, as published, on the host.
    evaluate.ode_solver = "adams_log"
    evaluate.ode_steps = 98  # of adams (an even number, one evaluation each, and one more) and rk4 (four each)
    evaluate.rtol = 1e-5  # tolerances of dopri5 and scipy
    evaluate.atol = 1e-5
    evaluate.probe = "rademacher"  # of the divergence: rademacher, gaussian; or exact, for small images
    evaluate.num_probes = 1  # probes for each image
    evaluate.bound = False  # bound on the SDE's likelihood instead of the ODE's likelihood
    evaluate.dsm = True  # the bound's form: denoising or sliced score matching
    evaluate.offset = True  # the bound's start-time correction
    evaluate.bound_times = 1000  # times behind the bound of each image
    evaluate.bound_importance_sampling = True  # draw them in proportion to g^2 / sigma^2, else uniformly
    evaluate.bound_starts = 100  # draws behind the start-time correction of each image
    evaluate.dequantizer = False  # learned dequantization noise instead of eval.dequantization
    evaluate.dequantization = "uniform"  # noise that makes levels a density: uniform, truncated_normal
    evaluate.truncation = 3.0  # of truncated_normal: half a level, in standard deviations of the noise it starts from
    evaluate.num_importance_samples = 1  # draws averaged inside the logarithm: a tighter bound, with probe=exact
    evaluate.num_samples = 50_000  # images behind FID, IS and KID
    evaluate.features = "inception"  # the network whose features FID compares: inception, classifier
    evaluate.inception = "assets/inception-2015-12-05.npz"  # its weights, from python -m tools.convert_inception
    evaluate.inception_centre = 128.0  # its input is (level - centre) / centre: 128 as in its graph, 127.5 as in TF-GAN
    evaluate.statistics_dir = "assets/stats"  # where features and their statistics of data sets are kept
    evaluate.statistics_split = "train"  # the real images that samples are compared with: train, as published; test
    evaluate.statistics = ""  # compare with this file's instead: pool_3, or mu and sigma, as others publish them
    return evaluate


def _deq() -> ConfigDict:
    deq = ConfigDict()  # training of the learned dequantization noise
    deq.name = "flowpp_cifar10"  # flowpp_cifar10 or flowpp_imagenet32: the published architectures, by these fields
    deq.filters = 0  # channels of the networks in its couplings; 0 here and below: as published
    deq.components = 0  # logistics in a mixture
    deq.blocks = 0  # residual blocks in each network
    deq.attn_heads = 0  # heads of their attention
    deq.n_iters = 300_001  # the run ends at this step
    deq.dropout = 0.0
    deq.ema_rate = 0.99  # decay of the averaged parameters that evaluation uses
    deq.offset = True  # train on the bound with its start-time correction
    return deq
