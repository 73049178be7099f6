# docker build -t blueberry .                                               PyTorch for the CPU
# docker build -t blueberry --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   PyTorch for CUDA 13.0
# docker run --rm -it -v "$PWD:/work" blueberry train my_idea               experiments/ and outputs/ of this folder
FROM debian:bookworm-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=pretrained
COPY . /tmp/blueberry-video
RUN cd /tmp/blueberry-video \
  && VENV=/opt/venv EXTRAS="$EXTRAS" TORCH_INDEX="$TORCH_INDEX" containers/install.sh \
  && rm -rf /tmp/blueberry-video /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["blueberry"]
CMD ["--help"]
