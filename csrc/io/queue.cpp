#include "io/queue.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "io/checksum.h"

namespace trilith::io {

// Aligned memory of a thread for one block, had when it is first needed. It is shared memory, so that a fork makes no
// copy-on-write pages of it.
class Queue::Buffer {
  public:
    explicit Buffer(int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)) {}
    ~Buffer() {
        if (memory_) ::munmap(memory_, num_bytes_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Null where there is no memory for it.
    void* get() {
        if (!memory_) {
            void* found = ::mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            if (found != MAP_FAILED) memory_ = found;
        }
        return memory_;
    }

  private:
    size_t num_bytes_;
    void* memory_ = nullptr;
};

// The right to work with memory, held as long as it lives.
class Queue::Turn {
  public:
    explicit Turn(Shared& shared) : shared_(shared) {
        std::unique_lock<std::mutex> lock(shared_.lock);
        shared_.turn.wait(lock, [&] { return shared_.free_turns > 0; });
        --shared_.free_turns;
    }
    ~Turn() {
        {
            std::lock_guard<std::mutex> lock(shared_.lock);
            ++shared_.free_turns;
        }
        shared_.turn.notify_one();
    }

  private:
    Shared& shared_;
};

Queue::Queue(int queue_depth, int workers, int64_t block_bytes, const std::string& name, Gate gate)
    : block_bytes_(round_up(std::max<int64_t>(block_bytes, 1))),
      gate_(std::move(gate)),
      process_(::getpid()),
      shared_(new Shared),
      threads_(new std::vector<std::thread>) {
    shared_->free_turns = std::max(workers, 1);
    for (int index = 0; index < std::max(queue_depth, 1); ++index) {
        threads_->emplace_back([this] { serve(); });
#ifdef __linux__
        pthread_setname_np(threads_->back().native_handle(), name.substr(0, 15).c_str());
#else
        (void)name;
#endif
    }
}

void Queue::stop() {
    if (::getpid() != process_) return;
    {
        std::lock_guard<std::mutex> lock(shared_->lock);
        shared_->is_stopped = true;
    }
    shared_->work.notify_all();
    for (std::thread& thread : *threads_) thread.join();
    threads_->clear();
}

Queue::~Queue() {
    if (::getpid() != process_) return;  // the threads are not here, and one of them may have held the lock
    stop();
    delete threads_;
    delete shared_;
}

std::shared_ptr<Operation> Queue::submit(Request request) {
    if (::getpid() != process_) throw std::logic_error("an io queue does not outlive a fork: its threads stay behind");
    auto operation = std::make_shared<Operation>(std::move(request));
    const Request& what = operation->request;
    operation->num_blocks = what.kind == Kind::sync ? 1 : (what.num_bytes + block_bytes_ - 1) / block_bytes_;
    std::lock_guard<std::mutex> lock(shared_->lock);
    if (shared_->is_stopped) throw std::logic_error("the io queue is stopped");
    std::deque<Handle>& chain = shared_->chains[what.chain];
    chain.push_back(operation);
    if (chain.size() == 1) begin(operation);
    return operation;
}

bool Queue::wait(const Operation& operation, int64_t milliseconds) const {
    std::unique_lock<std::mutex> lock(shared_->lock);
    return shared_->ended.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return operation.is_done; });
}

bool Queue::wait_all(int64_t milliseconds) const {
    std::unique_lock<std::mutex> lock(shared_->lock);
    return shared_->ended.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return shared_->chains.empty(); });
}

Fault Queue::fault(const Operation& operation) const {
    std::lock_guard<std::mutex> lock(shared_->lock);
    return operation.fault;
}

int64_t Queue::bytes_of(int64_t Shared::*counter) const {
    std::lock_guard<std::mutex> lock(shared_->lock);
    return shared_->*counter;
}

// Under the lock: the operation has come to the front of its chain.
void Queue::begin(const Handle& operation) {
    if (!operation->num_blocks) return end(operation);
    shared_->ready.push_back(operation);
    const int64_t wanted = std::min<int64_t>(operation->num_blocks, static_cast<int64_t>(threads_->size()));
    for (int64_t i = 0; i < wanted; ++i) shared_->work.notify_one();
}

// Under the lock: the last block of the operation has ended.
void Queue::end(const Handle& operation) {
    operation->is_done = true;
    auto found = shared_->chains.find(operation->request.chain);
    std::deque<Handle>& chain = found->second;
    chain.pop_front();
    if (chain.empty())
        shared_->chains.erase(found);
    else
        begin(chain.front());
    shared_->ended.notify_all();
}

void Queue::serve() {
    Buffer buffer(block_bytes_);
    std::unique_lock<std::mutex> lock(shared_->lock);
    for (;;) {
        shared_->work.wait(lock, [&] { return !shared_->ready.empty() || (shared_->is_stopped && shared_->chains.empty()); });
        if (shared_->ready.empty()) return;
        const Handle operation = shared_->ready.front();
        const int64_t index = operation->num_begun++;
        if (operation->num_begun == operation->num_blocks) shared_->ready.pop_front();
        lock.unlock();
        const Fault fault = run_block(*operation, index, buffer);
        lock.lock();
        ++operation->num_ended;
        const int64_t size = std::min(block_bytes_, operation->request.num_bytes - index * block_bytes_);
        if (fault.cause != Cause::none) {
            if (operation->fault.cause == Cause::none) operation->fault = fault;
            if (operation->num_begun < operation->num_blocks) {  // no further block begins
                auto& ready = shared_->ready;
                ready.erase(std::find(ready.begin(), ready.end(), operation));
                operation->num_blocks = operation->num_begun;
            }
        } else if (operation->request.kind == Kind::read) {
            shared_->bytes_read += size;
        } else if (operation->request.kind == Kind::write) {
            shared_->bytes_written += size;
        }
        if (operation->num_ended == operation->num_blocks) {
            end(operation);
            if (shared_->is_stopped && shared_->chains.empty()) shared_->work.notify_all();
        }
    }
}

Fault Queue::run_block(const Operation& operation, int64_t index, Buffer& buffer) {
    const Request& what = operation.request;
    Fault fault;
    fault.start = index * block_bytes_;
    fault.size = what.kind == Kind::sync ? 0 : std::min(block_bytes_, what.num_bytes - fault.start);
    auto failed = [&](Cause cause, Moved moved = {0, 0}) {
        fault.cause = cause;
        fault.moved = moved;
        return fault;
    };
    // A read comes after its source in their chain, so the source has ended.
    if (what.source && this->fault(*what.source).cause != Cause::none) return failed(Cause::source);
    char* memory = what.memory + fault.start;
    uint64_t* sum = what.checksums ? what.checksums + index : nullptr;
    auto summed = [&] {
        Turn turn(*shared_);
        return checksum(memory, fault.size);
    };
    if (sum && what.kind == Kind::write) *sum = summed();
    if (gate_) {
        if (const int error = gate_(operation)) return failed(Cause::gate, {0, error});
    }
    if (what.kind == Kind::sync) {
        const int error = what.file->sync();
        return error ? failed(Cause::moved, {0, error}) : fault;
    }
    void* aligned = what.file->is_direct() ? buffer.get() : nullptr;
    if (what.file->is_direct() && !aligned) return failed(Cause::moved, {0, ENOMEM});
    auto copy = [&](void* to, const void* from, int64_t num_bytes) {
        Turn turn(*shared_);
        std::memcpy(to, from, static_cast<size_t>(num_bytes));
    };
    const int64_t offset = what.offset + fault.start;
    const Moved moved = what.kind == Kind::write ? what.file->write(memory, fault.size, offset, aligned, copy)
                                                 : what.file->read(memory, fault.size, offset, aligned, copy);
    if (moved.num_bytes < fault.size) return failed(Cause::moved, moved);
    if (sum && what.kind == Kind::read && *sum != summed()) return failed(Cause::changed, moved);
    return fault;
}

}  // namespace trilith::io
