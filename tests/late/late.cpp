/*
 * A device in host memory, for tests: it does what it is asked to later, each stream in its order.
 *
 * Made with torch's extension interface (PrivateUse1), from which torch has its generic streams and
 * events. A copy is under way for some milliseconds, and waits where a real device's would: between
 * device and host unless it is non_blocking. All else is computed by the host's kernels; what they
 * have made is on the device when the stream comes to it.
 */
#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <torch/extension.h>
#include <torch/library.h>

namespace {
constexpr auto KEY = c10::DeviceType::PrivateUse1;

struct Worker {
    std::mutex lock;
    std::condition_variable news;
    std::deque<std::function<void()>> tasks;
    uint64_t given = 0, done = 0;
    Worker() {
        std::thread([this] { work(); }).detach();
    }
    void work() {
        std::unique_lock<std::mutex> l(lock);
        for (;;) {
            news.wait(l, [&] { return !tasks.empty(); });
            auto task = std::move(tasks.front());
            tasks.pop_front();
            l.unlock();
            task();
            task = nullptr;
            l.lock();
            done++;
            news.notify_all();
        }
    }
    uint64_t give(std::function<void()> task) {
        std::lock_guard<std::mutex> l(lock);
        tasks.push_back(std::move(task));
        news.notify_all();
        return ++given;
    }
    void wait(uint64_t number) {
        std::unique_lock<std::mutex> l(lock);
        news.wait(l, [&] { return done >= number; });
    }
    uint64_t all() {
        std::lock_guard<std::mutex> l(lock);
        return given;
    }
};

int delay = 3;
std::mutex streams_lock;
std::deque<Worker> &streams() {
    static auto *s = new std::deque<Worker>(1);
    return *s;
}
thread_local int64_t current = 0;
Worker &worker(int64_t id) {
    std::lock_guard<std::mutex> l(streams_lock);
    return streams()[id];
}
c10::Device dev() {
    return c10::Device(KEY, 0);
}
c10::Stream stream(int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, dev(), id);
}

struct Event {
    int64_t stream = 0;
    uint64_t number = 0;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override {
        return KEY;
    }
    c10::Device exchangeDevice(c10::Device) const override {
        return dev();
    }
    c10::Device getDevice() const override {
        return dev();
    }
    void setDevice(c10::Device) const override {
    }
    void uncheckedSetDevice(c10::Device) const noexcept override {
    }
    c10::Stream getStream(c10::Device) const override {
        return stream(current);
    }
    c10::Stream getDefaultStream(c10::Device) const override {
        return stream(0);
    }
    c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override {
        return getNewStream(d, 0);
    }
    c10::Stream getNewStream(c10::Device, int) const override {
        std::lock_guard<std::mutex> l(streams_lock);
        streams().emplace_back();
        return stream(streams().size() - 1);
    }
    c10::Stream exchangeStream(c10::Stream s) const override {
        auto before = stream(current);
        current = s.id();
        return before;
    }
    c10::DeviceIndex deviceCount() const noexcept override {
        return 1;
    }
    void record(void **event, const c10::Stream &s, const c10::DeviceIndex,
                const c10::EventFlag) const override {
        if (!*event)
            *event = new Event;
        auto *e = static_cast<Event *>(*event);
        e->stream = s.id();
        e->number = worker(s.id()).all();
    }
    void block(void *event, const c10::Stream &s) const override {
        Event e = *static_cast<Event *>(event);
        if (e.stream != s.id())
            worker(s.id()).give([e] { worker(e.stream).wait(e.number); });
    }
    bool queryEvent(void *event) const override {
        Event e = *static_cast<Event *>(event);
        auto &w = worker(e.stream);
        std::lock_guard<std::mutex> l(w.lock);
        return w.done >= e.number;
    }
    void destroyEvent(void *event, const c10::DeviceIndex) const noexcept override {
        delete static_cast<Event *>(event);
    }
    void synchronizeEvent(void *event) const override {
        Event e = *static_cast<Event *>(event);
        worker(e.stream).wait(e.number);
    }
    bool queryStream(const c10::Stream &) const override {
        return false;
    }
    void synchronizeStream(const c10::Stream &s) const override {
        auto &w = worker(s.id());
        w.wait(w.all());
    }
    void synchronizeDevice(const c10::DeviceIndex) const override {
        size_t n;
        {
            std::lock_guard<std::mutex> l(streams_lock);
            n = streams().size();
        }
        for (size_t i = 0; i < n; i++) {
            auto &w = worker(i);
            w.wait(w.all());
        }
    }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : at::PrivateUse1HooksInterface {
    bool isBuilt() const override {
        return true;
    }
    bool isAvailable() const override {
        return true;
    }
    bool hasPrimaryContext(c10::DeviceIndex) const override {
        return true;
    }
    c10::DeviceIndex deviceCount() const override {
        return 1;
    }
    void setCurrentDevice(c10::DeviceIndex) const override {
    }
    c10::DeviceIndex getCurrentDevice() const override {
        return 0;
    }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
        return 0;
    }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
        return 0;
    }
    c10::Allocator *getPinnedMemoryAllocator() const override {
        return at::getCPUAllocator();
    }
};

struct Alloc final : c10::Allocator {
    static void drop(void *p) {
        // Memory is there until the stream comes to its end.
        auto &w = worker(current);
        w.give([p] { free(p); });
    }
    c10::DataPtr allocate(size_t n) override {
        void *p = nullptr;
        TORCH_CHECK(posix_memalign(&p, 64, n + 64) == 0);
        memset(p, 0x5a, n);
        return {p, p, &drop, dev()};
    }
    c10::DeleterFnPtr raw_deleter() const override {
        return &drop;
    }
    void copy_data(void *d, const void *s, std::size_t n) const override {
        memcpy(d, s, n);
    }
};
Alloc allocator;
REGISTER_ALLOCATOR(KEY, &allocator);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                     c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     dtype.value_or(at::kFloat), format);
}
at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(
        C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
        c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype.value_or(at::kFloat));
}
at::Tensor as_strided(const at::Tensor &t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
    std::optional<int64_t> o;
    if (offset)
        o = offset->expect_int();
    return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size),
                                             C10_AS_INTARRAYREF_SLOW(stride), o);
}
at::Tensor view(const at::Tensor &t, c10::SymIntArrayRef size) {
    return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor &t, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor in_host(const at::Tensor &t) {
    auto a = at::from_blob(t.data_ptr(), t.sizes(), t.strides(),
                           at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
    if (t.is_conj())
        a = a.conj();
    if (t.is_neg())
        a = a._neg_view();
    return a;
}

// Begin to copy.
void transfer(const at::Tensor &dst, const at::Tensor &src, bool wait) {
    auto &w = worker(current);
    auto number = w.give([dst, src, ms = delay] {
        std::this_thread::sleep_for(std::chrono::milliseconds(ms));
        at::NoGradGuard no_grad;
        at::AutoDispatchBelowADInplaceOrView guard;
        in_host(dst).copy_(in_host(src));
    });
    if (wait)
        w.wait(number);
}
at::Tensor &copy_(at::Tensor &dst, const at::Tensor &src, bool non_blocking) {
    bool between = dst.device() == src.device();
    transfer(dst.detach(), src.detach(), !between && !non_blocking);
    return dst;
}
at::Tensor copy_from(const at::Tensor &src, const at::Tensor &dst, bool non_blocking) {
    at::Tensor d = dst;
    copy_(d, src, non_blocking);
    return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor &src, const at::Tensor &dst) {
    if (dst.sizes() != src.sizes())
        at::native::resize_impl_cpu_(dst.unsafeGetTensorImpl(), src.sizes(), std::nullopt, true);
    transfer(dst.detach(), src.is_cpu() ? src.detach().clone() : src.detach(), false);
    return dst;
}
at::Scalar local_scalar(const at::Tensor &t) {
    return t.cpu().item();
}
const at::Tensor &resize_(const at::Tensor &t, c10::SymIntArrayRef size,
                          std::optional<at::MemoryFormat>) {
    auto s = C10_AS_INTARRAYREF_SLOW(size);
    TORCH_CHECK(t.storage().nbytes() >= (size_t)(c10::multiply_integers(s) * t.itemsize()) ||
                t.numel() == 0);
    if (t.numel() != c10::multiply_integers(s)) {
        auto fresh = at::empty(s, t.options());
        t.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    }
    t.unsafeGetTensorImpl()->set_sizes_contiguous(s);
    return t;
}
at::Tensor &set_storage(at::Tensor &t, at::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
    t.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
    t.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size),
                                                   C10_AS_INTARRAYREF_SLOW(stride));
    return t;
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    at::native::cpu_fallback(op, stack);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("as_strided", &as_strided);
    m.impl("view", &view);
    m.impl("_reshape_alias", &reshape_alias);
    m.impl("copy_", &copy_);
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("_local_scalar_dense", &local_scalar);
    m.impl("resize_", &resize_);
    m.impl("set_.source_Storage_storage_offset", &set_storage);
}
} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    m.def("set_delay", [](int ms) { delay = ms; });
}
