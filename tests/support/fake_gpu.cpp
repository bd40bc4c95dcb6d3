// Lets autograd run on tensors that claim to be on `cuda`, in a build of torch without CUDA.
//
// torch's engine asks for the current stream of a tensor's device, and a CPU build has none. Here
// every stream is the same one, events do nothing, and there is no memory: kernels are FakeTensor's.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device FIRST(CUDA, 0);

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return FIRST; }
  c10::Device getDevice() const override { return FIRST; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, FIRST);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(FIRST); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
};

}  // namespace

extern "C" void claim_gpu() {
  // torch made its hooks when it was loaded: replace their table of functions, not the object.
  static const auto* hooks = new Hooks();
  const auto& made = at::detail::getCUDAHooks();
  std::memcpy(const_cast<void*>(static_cast<const void*>(&made)), hooks, sizeof(void*));
  c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(new Guard());
}
