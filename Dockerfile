# edm2 on a machine with NVIDIA GPUs. PyTorch's wheels bring CUDA along: the host needs only its driver and the
# NVIDIA Container Toolkit.
#
#   docker build -t edm2 .
#   docker run --gpus all --ipc=host -v "$PWD:/work" edm2 train --preset fashion-mnist --out runs/a
#   docker run --gpus all --ipc=host -v "$PWD:/work" --entrypoint torchrun edm2 --nproc-per-node 8 -m edm2 train ...
FROM python:3.12-slim

# torch.compile calls a C++ compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/edm2
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[all]'

WORKDIR /work
ENTRYPOINT ["edm2"]
CMD ["--help"]
