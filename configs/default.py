"""Every field of a configuration, with its default and its meaning. Other files state their differences from this one.

Field names are the published ones wherever the published code has the field. docs/configuration.md is generated from
the comments here: a comment above or beside a field is its meaning, and a function's docstring opens its section.
"""

from typing import Any, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any
"""A ConfigDict, or a part of one, in the signatures that read it; its fields are dynamic."""


def get_config() -> Config:
    config = ConfigDict()
    config.seed = 42  # seed of all randomness: initialisation, data order, noise, probes and samples
    config.training = _training()
    config.data = _data()
    config.model = _model()
    config.optim = _optim()
    config.sampling = _sampling()
    config.eval = _eval()
    config.deq = _deq()
    config.control = _control()
    config.cost = _cost()
    return config


def _training() -> ConfigDict:
    """The SDE, the objective, and the schedule of a training run."""
    training = ConfigDict()
    # forward SDE: vesde, linearvesde, vpsde or subvpsde; with gamma = 2 ln(sigma / alpha) linear in time,
    # lineargammavpsde or straightpathsde (alpha = 1 - sigma)
    training.sde = "vesde"
    # train in continuous time (True), or at model.num_scales discrete noise levels (False), which is SMLD for vesde and
    # DDPM for vpsde
    training.continuous = True
    training.smallest_time = 1e-5  # losses and likelihoods use times in [smallest_time, 1]
    # examples in a batch, over all devices; the published runs use 128 for orders 1 and 2, and 48 for order 3
    training.batch_size = 128
    # parts of the batch that are computed one after another, in training and for the test loss; more parts need less
    # memory and give the same gradient
    training.accumulation_steps = 1
    # precision of matrix products and convolutions of 32-bit numbers in training: default (GPUs and TPUs round to fewer
    # bits), high, or highest (all bits). Likelihoods always have the highest precision
    training.matmul_precision = "default"
    # divide the moments of Adam and the averaged parameters among the devices, each of which updates its own part. The
    # result is the same; each device needs less memory
    training.shard_state = False
    training.n_iters = 4_000_001  # step at which training ends
    # number of further steps of a run that starts from training.init_from; 0 means to train to n_iters
    training.n_iters_from_start = 0
    training.n_jitted_steps = 1  # training steps per compiled call; more help on CPUs, and if a step is very short
    # loss to minimise. Score matching: denoising, implicit (with the trace of the Jacobian), sliced (along random
    # projections) or sliced_vr (the same with less variance). Baselines of the paper: meng (the second order of Meng et
    # al.) or ode_likelihood (the likelihood of the ODE, differentiated through its solver). implicit and the baselines
    # are for points of few dimensions
    training.objective = "denoising"
    training.num_projections = 1  # random projections of each example, for sliced and sliced_vr
    training.likelihood_steps = 20  # steps of the solver for ode_likelihood
    training.noise_level = 0.0  # the only noise level sigma / alpha to train at; 0 means all levels
    training.score_matching_order = 1  # highest order of denoising score matching in the loss: 1, 2 or 3
    training.second_order_weight = 1.0  # weight of the second-order terms; the first-order term has weight 1
    training.third_order_weight = 1.0  # weight of the third-order term
    # compute orders 2 and 3 from the exact Jacobian instead of probes; only for points of few dimensions
    training.exact_derivatives = False
    # compute the gradient of order 3 from its residual and forward derivatives only. It adds a third to the
    # arithmetic; together with model.remat=conv it needs 0.4 of the memory
    training.residual_first = False
    # estimator of orders 2 and 3 with probes: published (one probe, an upper bound), or unbiased (two probes: less
    # noise, for up to twice the cost; see docs/method.md). For order 2 with the trace alone: squared_trace (one probe,
    # as in i-DODE) or unbiased_trace (two probes)
    training.high_order_estimator = "published"
    # weights of the first order by noise level: constant (as published), or residual (one over the variance of the
    # term's error, which follows from the noise that the score leaves unexplained, as measured during training)
    training.first_order_weighting = "constant"
    # weights of orders 2 and 3 by noise level, relative to the first order: constant, residual, or first_order (the
    # weights of the first order)
    training.high_order_weighting = "constant"
    # fraction of the batch that has the terms of orders 2 and 3: 1, 1/2, 1/3 and so on. The expectation of the loss
    # does not change. With high_order_weighting=residual, these examples draw more times where the weights are large
    training.high_order_fraction = 1.0
    # spread the times of a batch evenly instead of drawing them independently
    training.stratified_times = False
    # fraction of the examples whose class is hidden from a network with data.num_classes, so that it also learns the
    # score without a class
    training.label_dropout = 0.1
    training.likelihood_weighting = False  # weight the first order by g^2 (True) or by sigma^2 (False)
    # draw times with density proportional to g^2 / sigma^2; needs likelihood_weighting
    training.importance_weighting = False
    # density of times with importance_weighting: noise (proportional to g^2 / sigma^2, the weight of the noise's error)
    # or velocity (proportional to alpha^2 g^2 / sigma^2, the weight of the velocity's error; for SDEs with gamma_min)
    training.importance_density = "noise"
    # state losses in bits/dim, as terms of the bound on -ln p of images whose levels have no noise. Orders 1 and 2 have
    # their weights in the bound. The terms of reconstruction and prior are added; they have no gradient
    training.bits_per_dim = False
    # average over dimensions (True) or take half the sum (False); orders 2 and 3 need the average
    training.reduce_mean = True
    training.log_freq = 100  # steps between records of the training loss
    training.eval_freq = 100  # steps between records of the test loss
    training.eval_batches = 1  # test batches per test loss; every record uses the same batches and noise
    # training stops after this many steps in a row whose loss or gradient is not finite; such steps change no
    # parameters
    training.max_nonfinite = 10
    training.snapshot_freq = 50_000  # steps between checkpoints that are kept permanently
    training.snapshot_freq_for_preemption = 10_000  # steps between checkpoints that are only kept to resume from
    training.snapshot_sampling = True  # draw a grid of samples at every permanent checkpoint
    # sampler of these grids: few_step (dpm_solver with 20 network evaluations) or configured (by the fields of
    # sampling)
    training.snapshot_sampler = "few_step"
    # checkpoint to start a new run from: a workdir, one step's folder in its checkpoints, or a published file
    training.init_from = ""
    # parts of the state at init_from to reset, joined by commas: step (and with it the warm-up), opt, ema
    training.init_reset = ""
    return training


def _data() -> ConfigDict:
    """The data set, and how its images are scaled. docs/data.md describes the data sets."""
    data = ConfigDict()
    # name of the data set. Published images: CIFAR10, MNIST, FashionMNIST, KMNIST, EMNIST, SVHN, ImageNet, CelebA,
    # LSUN, CelebAHQ, FFHQ. No download: digits. Images at data.path: npz, folder. Points of a density: mixture,
    # checkerboard, swissroll, moons, far_modes
    data.dataset = "CIFAR10"
    # version of ImageNet: old (the images of the papers) or new (the images that image-net.org has had since 2021),
    # whose results are not comparable. Part of EMNIST: balanced, letters, digits, mnist, byclass, bymerge
    data.variant = ""
    data.category = ""  # scene of LSUN, such as church_outdoor
    # file for data.dataset=npz, folder of images for folder, or original images for CelebA, LSUN, CelebAHQ or FFHQ
    data.path = ""
    # folder with data sets as --mode=prepare or tensorflow-datasets writes them, and the cache of decoded images
    data.dir = "assets/data"
    # input of --mode=prepare: the published file, or the folder with the files; if empty, tensorflow-datasets downloads
    data.archive = ""
    data.archive_sha256 = ""  # SHA-256 hashes, joined by commas, to accept instead of the known ones
    data.num_points = 1_000_000  # training points drawn from a density
    data.num_test_points = 10_000  # test points drawn from a density
    data.image_size = 32  # height and width of the images
    data.num_channels = 3  # channels of the images
    data.levels = 256  # grey levels of a channel; bits/dim are computed for this number of levels
    data.centered = False  # scale images to [-1, 1] (True) or to [0, 1] (False) for the network
    data.random_flip = True  # mirror training images left to right at random
    # number of classes, if the class is an input of the network (ncsnpp only); 0 means that it is not
    data.num_classes = 0
    data.uniform_dequantization = False  # add uniform noise of one grey level to training images
    # train on (level + 1/2) / levels, the middle of the bin of each level, instead of level / (levels - 1)
    data.bin_centers = False
    return data


def _model() -> ConfigDict:
    """The constants of the SDE, and the score network."""
    model = ConfigDict()
    # network for images: ncsnpp (NCSN++ and DDPM++), ddpm, ncsn, ncsnv2_64, ncsnv2_128 or ncsnv2_256 (NCSNv2 for images
    # of this size), or vdm (Kingma et al., 2021; not for VE SDEs). Network for points: mlp (ours) or mlp_published (as
    # in the paper). ncsn and ncsnv2_* need training.sde=vesde and training.continuous=False
    model.name = "ncsnpp"
    model.sigma_min = 0.01  # smallest noise level of the VE SDE
    model.sigma_max = 50.0  # largest noise level of the VE and linear VE SDEs
    model.beta_min = 0.1  # noise rate of the VP and sub-VP SDEs at t = 0
    model.beta_max = 20.0  # noise rate of the VP and sub-VP SDEs at t = 1
    model.gamma_min = -13.3  # 2 ln(sigma / alpha) at t = 0, for SDEs in which it is linear in time
    model.gamma_max = 5.0  # 2 ln(sigma / alpha) at t = 1, for SDEs in which it is linear in time
    # steps of predictor-corrector samplers if sampling.num_steps is 0; with training.continuous=False also the number
    # of noise levels
    model.num_scales = 1000
    model.ema_rate = 0.999  # decay of the averaged parameters, which evaluation uses
    model.ema_warmup = False  # begin with a smaller decay: min(ema_rate, (1 + step) / (10 + step))
    model.dropout = 0.1  # dropout rate in the residual blocks
    # time embedding of ncsnpp: fourier (of ln sigma) or positional (of 999 t, or of the number of a noise level)
    model.embedding_type = "fourier"
    model.fourier_scale = 16  # standard deviation of the Fourier frequencies
    model.trainable_embedding = False  # train the Fourier frequencies; True is not supported
    model.conditional = True  # feed the time embedding to the residual blocks
    model.nonlinearity = "swish"  # nonlinearity: swish, elu, relu or lrelu
    # normalisation: GroupNorm, the only choice of ncsnpp; InstanceNorm++, InstanceNorm or VarianceNorm for ddpm and
    # ncsnv2_*; ncsn needs InstanceNorm++
    model.normalization = "GroupNorm"
    model.interpolation = "bilinear"  # how ncsn and ncsnv2_* enlarge feature maps: bilinear or nearest_neighbor
    model.nf = 128  # channels at full resolution
    model.ch_mult = (1, 2, 2, 2)  # channels at each resolution, in units of nf
    model.num_res_blocks = 4  # residual blocks at each resolution; for vdm, blocks of the downward path
    model.attn_resolutions = (16,)  # image sizes at which self-attention follows each residual block
    model.attention_type = "ddpm"  # type of self-attention; ddpm is the only choice
    model.resamp_with_conv = True  # convolve after resampling; only with ddpm blocks
    model.resblock_type = "biggan"  # residual block: biggan or ddpm
    model.fir = True  # resample with a smoothing filter (True), or by repeating and averaging pixels (False)
    model.fir_kernel = (1, 3, 3, 1)  # taps of the smoothing filter
    model.skip_rescale = True  # divide the sum of two branches by sqrt(2)
    model.progressive = "none"  # output pyramid: none, output_skip or residual
    model.progressive_input = "residual"  # input pyramid: none, input_skip or residual
    model.progressive_combine = "sum"  # how the input pyramid joins the network: sum or cat
    model.init_scale = 0.0  # variance scale of the last layer of each block; 0 means nearly zero
    # divide the network's output by sigma; ncsnpp needs True for vesde with parameterization noise, else False
    model.scale_by_sigma = True
    # output of networks without scale_by_sigma: noise; velocity (only for SDEs with gamma_min), a combination of noise
    # and data with about the same size at all times; preconditioned, which adds to the score of Gaussian data
    model.parameterization = "noise"
    model.conv_size = 3  # size of the convolution kernels; 3 is the only choice
    model.data_init = False  # data-dependent initialisation; True is not supported for score networks
    model.fourier_features = True  # give vdm sin and cos of 2 pi 2^k x as further inputs, k = 6 and 7
    model.mlp_embedding = 64  # sines and cosines of the time that enter the mlp
    model.mlp_time_widths = (128, 128, 128)  # widths of the mlp's layers that see only the time
    model.mlp_data_widths = (128, 128, 128)  # widths of the mlp's layers that see only the point
    model.mlp_widths = (512, 512)  # widths of the mlp's layers that see both
    # precision of the feature maps of ncsnpp and ddpm: float32 or bfloat16. Parameters, their gradients, the moments of
    # feature maps and losses always have 32 bits. A model trained with bfloat16 can be evaluated with float32
    model.dtype = "float32"
    # values that the backward pass of ncsnpp, ddpm and vdm recomputes inside each block and each layer that resamples,
    # which needs less memory and more time: none; block, all; conv, all except the results of convolutions and other
    # linear maps of the channels. True of older configurations means block, False means none
    model.remat = "none"
    return model


def _optim() -> ConfigDict:
    """The optimizer, for score networks and dequantizers."""
    optim = ConfigDict()
    optim.optimizer = "Adam"  # optimizer; Adam is the only choice
    optim.lr = 2e-4  # learning rate after the warm-up
    optim.beta1 = 0.9  # decay of the first moment
    optim.beta2 = 0.999  # decay of the second moment
    optim.eps = 1e-8  # constant added to the denominator of an update
    optim.weight_decay = 0.0  # decoupled weight decay, as a multiple of the learning rate
    optim.decay_biases = True  # apply the weight decay to biases, too
    optim.warmup = 5000  # steps over which the learning rate rises linearly from 0
    # factor of the learning rate over the run, besides the warm-up: constant; or linear or cosine, which fall to 0 at
    # the last step
    optim.schedule = "constant"
    optim.grad_clip = 1.0  # largest global norm of the gradient; 0 or a negative value means no limit
    return optim


def _sampling() -> ConfigDict:
    """The sampler of images and points."""
    sampling = ConfigDict()
    # pc (predictor-corrector), ode (probability flow with adaptive steps), dpm_solver (DPM-Solver++), heun, langevin
    # (at the noise level of smallest_time) or annealed_langevin (from large noise levels to that one)
    sampling.method = "pc"
    # predictor of pc: euler_maruyama, reverse_diffusion, ancestral_sampling or none
    sampling.predictor = "reverse_diffusion"
    sampling.corrector = "langevin"  # corrector of pc: langevin, ald or none
    sampling.num_steps = 0  # predictor steps of pc; 0 means model.num_scales
    sampling.n_steps_each = 1  # corrector steps per predictor step
    sampling.snr = 0.16  # signal-to-noise ratio, which sets the size of the corrector's steps
    sampling.probability_flow = False  # let the predictor follow the ODE instead of the SDE
    # return the mean of the last update (pc) or the denoised last sample (other methods), without noise
    sampling.noise_removal = True
    sampling.smallest_time = 1e-5  # time at which sampling ends
    # factor that multiplies the noise from which sampling starts, and latents before they are decoded. With samplers
    # that follow the ODE, less than 1 gives more typical images with less variety
    sampling.temperature = 1.0
    sampling.ode_solver = "dopri5"  # solver of ode: dopri5 (on the devices) or scipy (on the host, as published)
    sampling.rtol = 1e-5  # relative tolerance of ode
    sampling.atol = 1e-5  # absolute tolerance of ode
    sampling.max_nfe = 20  # network evaluations that dpm_solver and heun may use
    sampling.order = 2  # order of dpm_solver: 1, 2 or 3
    sampling.eta = 0.0  # noise of dpm_solver: 0 follows the ODE, 1 the SDE; VE models need 1
    sampling.clip_denoised = True  # clip denoised images to the range of the data, in dpm_solver and heun
    # grid of dpm_solver and heun, uniform in log_snr, power or time; auto takes log_snr for dpm_solver, power for heun
    sampling.schedule = "auto"
    sampling.schedule_exponent = 7.0  # exponent of power: equal steps in (sigma / alpha)^(1 / exponent)
    sampling.num_levels = 10  # noise levels of annealed_langevin, in geometric steps
    sampling.steps_per_level = 100  # steps of langevin, and of annealed_langevin at each noise level
    # step size of langevin, and of annealed_langevin at the last noise level; at a larger level it grows with the
    # square of the level
    sampling.step_size = 2e-5
    sampling.batch_size = 256  # images drawn together, over all devices; 0: the largest batch that fits, estimated
    return sampling


def _eval() -> ConfigDict:
    """Settings of `--mode=eval`. docs/evaluation.md describes the choices."""
    evaluate = ConfigDict()
    evaluate.begin_ckpt = 1  # first permanent checkpoint to evaluate, in units of training.snapshot_freq
    # last permanent checkpoint to evaluate, in units of training.snapshot_freq; 0 means only the newest checkpoint
    evaluate.end_ckpt = 0
    # checkpoint to evaluate instead of the run's own: a workdir, one step's folder, or a published file
    evaluate.checkpoint = ""
    # checkpoint that --mode=train_deq trains a dequantizer for, in units of training.snapshot_freq; 0 means the newest
    evaluate.ckpt_id = 0
    evaluate.batch_size = 1024  # images evaluated together, over all devices; 0: the largest batch that fits, estimated
    evaluate.enable_loss = False  # compute the mean training loss over the test images
    evaluate.enable_bpd = True  # compute bits/dim of images, or the likelihood of points
    evaluate.enable_sampling = False  # draw samples and compute FID, IS and KID
    evaluate.bpd_dataset = "test"  # split whose likelihood is computed: train or test
    evaluate.num_repeats = 5  # passes over the images, each with new dequantization noise and probes
    evaluate.max_examples = 0  # evaluate only the first images; 0 means all
    evaluate.density_grid = 48  # cells per side of the density in the report, for points of 1 or 2 dimensions; 0: none
    # solver of the likelihood. In time: dopri5 and scipy (RK45 on the devices and, as published, on the host), and rk4.
    # Fixed steps in log noise: adams_log, rk4_log. Adaptive steps in log noise: dopri5_log, scipy_log
    evaluate.ode_solver = "dopri5"
    # fixed steps; adams_log needs an even number and one evaluation per step, rk4 needs four per step
    evaluate.ode_steps = 98
    evaluate.rtol = 1e-5  # relative tolerance of the adaptive solvers
    evaluate.atol = 1e-5  # absolute tolerance of the adaptive solvers
    evaluate.probe = "rademacher"  # divergence: rademacher or gaussian probes, or exact for few dimensions
    evaluate.num_probes = 1  # probes per image
    # where bits/dim of images are evaluated: x (as published), x_tmin (with the noise of training.smallest_time, where
    # the ODE is comparable with the bound without start-time correction), or both
    evaluate.likelihood_at = "x"
    evaluate.bound = False  # compute the bound on the SDE's likelihood instead of the ODE's likelihood
    evaluate.dsm = True  # form of the bound: denoising (True) or sliced (False) score matching
    evaluate.offset = True  # add the start-time correction to the bound
    evaluate.bound_times = 1000  # times per image in the bound
    evaluate.bound_importance_sampling = True  # draw these times in proportion to g^2 / sigma^2 instead of uniformly
    evaluate.bound_starts = 100  # draws per image in the start-time correction
    evaluate.diagnose_images = 64  # images behind each curve of --mode=diagnose
    evaluate.diagnose_times = 8  # times at which --mode=diagnose compares scores; a solve for each
    evaluate.diagnose_starts = 6  # start times of the likelihood in --mode=diagnose
    evaluate.dequantizer = False  # use a trained dequantizer instead of eval.dequantization
    # dequantizer to use instead of the run's own: its folder, one step's folder in its checkpoints, or a published file
    evaluate.dequantizer_checkpoint = ""
    # noise that turns grey levels into a density: uniform or truncated_normal; or normal, the SDE's own noise with a
    # decoder
    evaluate.dequantization = "uniform"
    evaluate.start_time = 0.0  # bits/dim use the noisy image as x_t at this time; 0 means training.smallest_time
    evaluate.truncation = 3.0  # standard deviations of the noise in half a grey level, for truncated_normal
    # draws of the noise averaged inside the logarithm; more draws tighten the bound, but need probe=exact
    evaluate.num_importance_samples = 1
    evaluate.num_samples = 50_000  # number of samples for FID, IS and KID
    # rounding of samples to grey levels, for models trained on levels without noise: truncate (as published) or
    # nearest. For models trained on levels with noise, a sample always becomes the level of its bin
    evaluate.rounding = "truncate"
    evaluate.inception_splits = 1  # parts of the samples that the Inception Score is averaged over; published: 1
    evaluate.features = "inception"  # network whose features are compared: inception, or classifier (with labels)
    # weights of Inception, as python -m evaluators.convert_inception writes them
    evaluate.inception = "assets/inception-2015-12-05.npz"
    # input of Inception is (level - centre) / centre: 128 as in the published graph, 127.5 as in TF-GAN
    evaluate.inception_centre = 128.0
    evaluate.statistics_dir = "assets/stats"  # folder for statistics of data sets and trained classifiers
    evaluate.statistics_split = "train"  # real images that samples are compared with: train (as published) or test
    # file with statistics of real images, as others publish them: an .npz file with pool_3, or with mu and sigma
    evaluate.statistics = ""
    return evaluate


def _deq() -> ConfigDict:
    """The learned dequantization noise that `--mode=train_deq` trains."""
    deq = ConfigDict()
    deq.name = "flowpp_cifar10"  # published architecture: flowpp_cifar10, flowpp_imagenet32 or flowpp_imagenet64
    deq.filters = 0  # channels of the networks in the couplings; 0 means the published number
    deq.components = 0  # logistic distributions in a mixture; 0 means the published number
    deq.blocks = 0  # residual blocks in each network; 0 means the published number
    deq.attn_heads = 0  # attention heads; 0 means the published number
    deq.n_iters = 300_001  # step at which training ends
    deq.dropout = 0.0  # dropout rate
    deq.ema_rate = 0.99  # decay of the averaged parameters, which evaluation uses
    deq.offset = True  # train on the bound with its start-time correction
    return deq


def _control() -> ConfigDict:
    """Latent codes and conditional samples. docs/evaluation.md describes their modes."""
    control = ConfigDict()
    # .npz file with an array `images` of integer images to encode or to condition on; empty: images of eval.bpd_dataset
    control.images = ""
    control.latents = ""  # .npz file with latents to decode; empty: the file from --mode=encode for the checkpoint
    control.num_images = 8  # images to condition on, or pairs of images to interpolate between
    control.num_draws = 6  # samples for each image, or for each class
    control.num_steps = 9  # pictures in a strip between two images, including both ends
    # known part of the images of --mode=inpaint: left, right, top, bottom or border, which is all but the central
    # quarter; or a file: .npz with an array `mask` of 0 and 1 (1: known), or a picture, where bright pixels are known
    control.mask = "left"
    # linear observations of --mode=restore: blocks, means over 2x2 pixels; or an .npz file with an array `matrix` of
    # shape [observations, pixels]. The file may have `observations` of shape [images, observations]; without them, they
    # are computed from the images
    control.matrix = "blocks"
    control.labels = ()  # classes that --mode=classes draws; empty means all
    # strength of the guidance in --mode=classes: 0 ignores the class, 1 is the conditional score, and more gives more
    # typical images of the class
    control.guidance = 1.0
    control.classifier_blocks = 1  # residual blocks in each group of the classifier of noisy images; published: 4
    control.classifier_width = 1  # width of the classifier, in units of 16, 32 and 64 channels; published: 10
    control.classifier_n_iters = 2000  # step at which --mode=train_classifier ends
    return control


def _cost() -> ConfigDict:
    """Settings of `--mode=cost`, which measures a training step of every order, batch size and memory setting."""
    cost = ConfigDict()
    cost.orders = (1, 2, 3)  # orders of score matching
    cost.batch_sizes = ()  # batch sizes, over all devices; empty means training.batch_size
    # memory settings to compare. Each is none, or one or more FIELD=VALUE separated by spaces. Fields that keep the
    # expected gradient and its noise: training.accumulation_steps, training.residual_first, training.shard_state and
    # model.remat. model.dtype rounds, and training.high_order_fraction adds noise
    cost.memory = ("none", "training.accumulation_steps=2", "model.remat=conv", "model.remat=block")
    cost.measure_steps = 10  # compiled calls that are timed, after one that is not; 0 only compiles
    # memory in GB that a batch must fit; 0 means the memory that JAX may use, by default 75 % of a GPU's
    cost.memory_gb = 0.0
    # GPU to compile for on a machine without one: h100, h200, a100, a100-40 or a6000. Then nothing is timed, and the
    # packages of requirements-gpu.txt are needed. Empty: the devices of this machine
    cost.device = ""
    cost.num_devices = 1  # number of GPUs of one machine that share the batch, with cost.device
    # time limit in seconds for --mode=selftest to compile a training step. Without a compiled step, its memory is
    # estimated, and its time is not shown
    cost.selftest_seconds = 60.0
    return cost
