--- The last known good membership, on disk.
--
-- Why: OpenResty must serve after a restart although nobody pushes. The file is one line of JSON
-- with the revision, then chunks, each with its length and checksum, of packed upstreams as they
-- lie in the dict, then how many they are. It is written beside the old one, synced and renamed;
-- the old one stays as `membership.prev`.
--
-- Where that is large, what changes is added to a log, `membership.log`: one line of JSON that says
-- which file it belongs to, then batches, each with its length and checksum, of what has changed.
-- So a change costs what it is itself, until the log has half the size of the file; then that is
-- written anew. A log that ends in the middle of a batch is good up to there.
--
-- Writing is off the request path and never more often than costs a twentieth of one worker's time.

local codec = require "tidegate.codec"
local json = require "tidegate.json"
local lock = require "tidegate.lock"
local posix = require "tidegate.posix"
local store = require "tidegate.store"

local ctl = ngx.shared.tidegate_ctl

local byte = string.byte
local collect = collectgarbage
local concat = table.concat
local crc32 = ngx.crc32_long
local find = string.find
local floor = math.floor
local ipairs = ipairs
local max = math.max
local min = math.min
local ngx = ngx
local now = ngx.now
local pairs = pairs
local pcall = pcall
local random = math.random
local sleep = ngx.sleep
local char = string.char
local sub = string.sub
local timer_at = ngx.timer.at
local type = type
local update_time = ngx.update_time

local FORMAT = 2
local LOG_FORMAT = 1
local LOG_FROM = 262144     -- bytes of the file from which on there is a log
local LOG_SHARE = 0.5       -- of the size of the file, that the log has at most
local LOCK = "persist"
local CHUNK = 65536
-- What the collector is told to do per chunk, in kB: enough that what one leaves behind is gone
-- before it adds up to much.
local STEP = 192
-- The pause after a write, as a multiple of what the write took.
local REST = 20
local MIN_REST = 0.1
local MAX_REST = 10
local FLUSH_PATIENCE = 2

local _M = {}

local path
local scheduled = false
local token                 -- of the lock, while this worker writes


local function put_number(value)
    return char(value % 256, floor(value / 256) % 256, floor(value / 65536) % 256,
                floor(value / 16777216) % 256)
end


local function get_number(text, at)
    local a, b, c, d = byte(text, at, at + 3)
    return d and a + b * 256 + c * 65536 + d * 16777216
end


-- Ways to the disk: in a thread, since fsync may take long; or at once, for a worker that ends,
-- into a file of its own: what it was writing in a thread may still be under way.
local finishing = false
local in_thread = {
    suffix = ".new",
    call = function(name, ...)
        finishing = name == "publish"
        local ok, done, result, err = pcall(ngx.run_worker_thread, "tidegate",
                                            "tidegate.persist_thread", name, ...)
        finishing = false
        if not ok or not done then
            return posix[name](...)
        end
        return result, err
    end,
}
local at_once = {
    suffix = ".last",
    call = function(name, ...)
        return posix[name](...)
    end,
}


-- The record of an upstream, as both files have it.
local function add_record(parts, name, blob)
    parts[#parts + 1] = put_number(#name) .. put_number(#blob)
    parts[#parts + 1] = name
    parts[#parts + 1] = blob
    return 8 + #name + #blob
end


local function sealed(parts)
    local data = concat(parts)
    return put_number(#data) .. put_number(crc32(data)) .. data
end


-- Writes the file by way of `way`, chunk by chunk, so that neither time nor memory is taken for the
-- whole at once. `breathe` is called between upstreams.
-- @param log what a log of it says that it belongs to
-- @return its size in bytes, or nil and why
local function write_file(way, revision, log, breathe)
    local new, begun, failed = path .. way.suffix, false, nil
    local parts, size, count, total, out = {}, 0, 0, 0, json.encode({
        format = FORMAT,
        revision = revision,
        writer = ctl:get("writer") or "",
        log = log,
    }) .. "\n"

    local function seal()
        if size > 0 then
            out = out .. sealed(parts)
            parts, size = {}, 0
        end
    end

    local function put()
        local ok, err = way.call(begun and "append" or "write", new, out)
        total = total + #out
        begun, out = true, ""
        failed = not ok and (err or "?") or nil
    end

    for _, name in ipairs(store.names()) do
        local blob = store.get(name)
        if blob then
            count = count + 1
            size = size + add_record(parts, name, blob)
        end
        if size >= CHUNK then
            seal()
            put()
            if failed then
                return nil, failed
            end
            collect("step", STEP)
        end
        breathe()
    end
    seal()
    out = out .. put_number(0) .. put_number(count)
    put()
    if failed then
        return nil, failed
    end
    local ok, err = way.call("publish", new, path)
    if not ok then
        return nil, err
    end
    return total
end


-- What has changed since the last write, as a batch of the log; nil where that is too much for it.
local function batch_of(changed, revision, room, breathe)
    local removed, parts, size = json.array(), { "" }, 0
    for name in pairs(changed) do
        local blob = store.get(name)
        if blob then
            size = size + add_record(parts, name, blob)
        else
            removed[#removed + 1] = name
        end
        if size > room then
            return nil
        end
        breathe()
    end
    parts[1] = json.encode({
        revision = revision,
        writer = ctl:get("writer") or "",
        removed = removed,
    }) .. "\n"
    return sealed(parts)
end


-- Adds what has changed to the log, if there is one for the file as it is.
-- @return whether that is done
local function write_log(way, revision, changed, breathe)
    local log, size = ctl:get("log"), ctl:get("log_size")
    local room = log and ctl:get("log_room") - size or 0
    if not changed or room <= 0 then
        return false
    end
    local data = batch_of(changed, revision, room, breathe)
    if data and size == 0 then
        data = json.encode({ format = LOG_FORMAT, of = log }) .. "\n" .. data
    end
    if not data or #data > room then
        -- So that nobody tries this again.
        ctl:delete("log")
        return false
    end
    -- Should it fail in the middle, or this worker end, its length is not as the next one expects.
    local ok, err = way.call("log", path .. ".log", data, size)
    if not ok then
        ngx.log(ngx.WARN, "tidegate: the log of the membership is given up: ", err)
        ctl:delete("log")
        return false
    end
    ctl:set("log_size", size + #data)
    return true
end


-- Whether the last write of all is too recent for another one.
local function must_rest()
    local left = (ctl:get("rest_until") or 0) - now()
    -- The clock may have been set.
    return left > 0 and left <= MAX_REST
end


local function write_all(way, revision, breathe)
    -- From here on no log belongs to what is in place until the new file is.
    ctl:delete("log")
    local log = revision .. "-" .. ngx.worker.pid() .. "-" .. random(0, 2 ^ 31)
    local size, err = write_file(way, revision, log, breathe)
    if not size then
        return nil, err
    end
    if size >= LOG_FROM then
        ctl:set("log_size", 0)
        ctl:set("log_room", floor(size * LOG_SHARE))
        ctl:set("log", log)
    end
    return true
end


-- Writes what is in force, if it is not on disk yet.
-- @return whether all of it was written, and not only what has changed
local function write(way, breathe)
    local content = ctl:get("content") or 0
    if content == (ctl:get("persisted_content") or 0)
            or way == in_thread and not ctl:get("log") and must_rest() then
        return false
    end
    -- In the middle of a write of its own, it is not known how far that has got.
    local may_log = not token
    token = token or lock.acquire(LOCK, 0)
    if not token then
        return false
    end
    -- A push that comes in the middle may be in part of the file. So the file has the revision
    -- from before it, which no delta builds on any more, and is soon written again.
    local revision = ctl:get("revision") or 0
    local changed, last = store.changes_since(ctl:get("persisted_change"))
    local ok, err, logged = true, nil, may_log and write_log(way, revision, changed, breathe)
    local waits = not logged and way == in_thread and must_rest()
    if not logged and not waits then
        ok, err = write_all(way, revision, breathe)
    end
    if ok and not waits then
        ctl:set("persisted_content", content)
        ctl:set("persisted_change", last)
        ctl:set("persisted_revision", revision)
    elseif not ok then
        ngx.log(ngx.ERR, "tidegate: the membership cannot be kept on disk: ", err)
    end
    lock.release(LOCK, token)
    token = nil
    return not logged and not waits
end


local function run()
    update_time()
    local started = now()
    local ok, result = pcall(write, in_thread, store.breathe)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: the membership cannot be kept on disk: ", result)
    elseif result then
        -- What a push and this have left behind: else it stays until requests have added as much.
        repeat
            store.breathe()
        until collect("step", STEP)
    end
    update_time()
    local rest = min(max((now() - started) * REST, MIN_REST), MAX_REST)
    if ok and result then
        -- What can be added to a log need not wait for that.
        ctl:set("rest_until", now() + rest)
        rest = MIN_REST
    end
    if not ngx.worker.exiting() then
        sleep(rest)
    end
    scheduled = false
    if (ctl:get("content") or 0) ~= (ctl:get("persisted_content") or 0) then
        _M.schedule()
    end
end


--- Has the membership written soon, if it differs from what is on disk.
function _M.schedule()
    if not scheduled and (ctl:get("content") or 0) ~= (ctl:get("persisted_content") or 0) then
        scheduled = timer_at(0, run) and true or false
    end
end


--- Writes it now, without yielding: for a worker that ends. What it was writing in a thread comes
-- to its end first, or the older state would replace the newer one.
function _M.flush()
    if finishing then
        posix.await_published(path .. in_thread.suffix, FLUSH_PATIENCE)
    end
    write(at_once, function() end)
end


-- Adds the upstreams of `chunk` from `at` on; gives how many they are, or nil and what is wrong.
local function read_records(chunk, at, upstreams)
    local count = 0
    while at <= #chunk do
        local name_size, blob_size = get_number(chunk, at), get_number(chunk, at + 4)
        local name_at = at + 8
        local blob_at = name_at + (name_size or 0)
        at = blob_at + (blob_size or 0)
        local blob = sub(chunk, blob_at, at - 1)
        if not blob_size or not codec.head(blob) then
            return nil, "has a record that cannot be read"
        end
        upstreams[sub(chunk, name_at, blob_at - 1)] = blob
        count = count + 1
    end
    return count
end


-- The part of `data` at `at`, with a length and a checksum before it.
-- @return it, and where the next one begins; or nil and why it is none
local function read_sealed(data, at)
    local size, sum = get_number(data, at), get_number(data, at + 4)
    if not sum then
        return nil, "has no end"
    end
    local chunk = sub(data, at + 8, at + 7 + size)
    if #chunk < size or crc32(chunk) ~= sum then
        return nil, "does not have the checksum that it says"
    end
    return chunk, at + 8 + size
end


local function read_line(text)
    local line_end = find(text, "\n", 1, true)
    local value = line_end and json.decode(sub(text, 1, line_end - 1))
    return type(value) == "table" and value or nil, line_end
end


local function parse(data)
    local head, line_end = read_line(data)
    if not head or head.format ~= FORMAT then
        return nil, "is not of format " .. FORMAT
    end
    local upstreams, count, at = {}, 0, line_end + 1
    while get_number(data, at) ~= 0 do
        local chunk, next_at = read_sealed(data, at)
        local added, err
        if chunk then
            added, err = read_records(chunk, 1, upstreams)
        end
        if not added then
            return nil, err or next_at
        end
        count, at = count + added, next_at
    end
    if get_number(data, at + 4) ~= count or at + 7 < #data then
        return nil, "has other upstreams than it says"
    end
    head.upstreams = upstreams
    return head
end


-- Adds a batch of a log to what was read before it; gives whether it is one.
local function add_batch(batch, saved)
    local head, line_end = read_line(batch)
    local found = {}
    if not head or type(head.removed) ~= "table"
            or not read_records(batch, line_end + 1, found) then
        return false
    end
    for _, name in ipairs(head.removed) do
        saved.upstreams[name] = nil
    end
    for name, blob in pairs(found) do
        saved.upstreams[name] = blob
    end
    saved.revision, saved.writer = head.revision, head.writer
    return true
end


-- Adds what the log of `saved` has, as far as it can be read.
local function add_log(saved)
    for _, file in ipairs({ path .. ".log", path .. ".log.prev" }) do
        local data = posix.read(file) or ""
        local head, line_end = read_line(data)
        if head and head.format == LOG_FORMAT and saved.log and head.of == saved.log then
            local at = line_end + 1
            while at <= #data do
                local batch, next_at = read_sealed(data, at)
                if not batch or not add_batch(batch, saved) then
                    ngx.log(ngx.WARN, "tidegate: ", file, " is good up to byte ", at - 1,
                            " of ", #data)
                    break
                end
                at = next_at
            end
        end
    end
end


--- Sets where the file is.
function _M.configure(directory)
    path = directory .. "/membership"
end


--- Loads the last known good membership into the empty dicts, else the one before.
function _M.load()
    for _, file in ipairs({ path, path .. ".prev" }) do
        local data = posix.read(file)
        if data then
            local count
            local saved, err = parse(data)
            if saved then
                add_log(saved)
                count, err = store.load(saved)
            end
            if count then
                ngx.log(ngx.NOTICE, "tidegate: revision ", saved.revision, " with ", count,
                        " upstreams loaded from ", file)
                ctl:set("persisted_revision", saved.revision)
                return true
            end
            store.clear()
            ngx.log(ngx.ERR, "tidegate: ", file, " cannot be used: ", err)
        end
    end
    return false
end


return _M
