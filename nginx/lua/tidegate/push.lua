--- A push of membership: its body, which may be large, is read upstream by upstream and applied.
--
-- Why: neither the whole body as a table nor all its upstreams are ever in memory at once, and
-- every fault in it is told at once. Must not decide who may push: that is `api`'s.

local answer = require "tidegate.answer"
local ffi = require "ffi"
local json = require "tidegate.json"
local members = require "tidegate.members"
local metrics = require "tidegate.metrics"
local persist = require "tidegate.persist"
local posix = require "tidegate.posix"
local probe = require "tidegate.probe"
local records = require "tidegate.records"
local store = require "tidegate.store"
local wire = require "tidegate.wire"

local cast = ffi.cast
local ffi_string = ffi.string
local ipairs = ipairs
local ngx = ngx
local pairs = pairs

local MAX_ERRORS = 100

local _M = {}


local function sorted(set)
    local list = json.array()
    for key in pairs(set) do
        list[#list + 1] = key
    end
    table.sort(list)
    return list
end


-- The member of the body that holds the upstreams.
local function field_of(full)
    return full and "upstreams" or "upsert"
end


-- The members of a body that may be large: the text of each where it is no table of upstreams.
-- Answers and gives nil where it is no object.
-- @param large name of the member that is left as it is
-- @return values by name; bytes, and where in them the large one begins and ends (nil: not there)
local function read_members(large)
    ngx.req.read_body()
    local text = ngx.req.get_body_data()
    local bytes, size, release = nil, 0, nil
    if text then
        bytes, size = cast("const uint8_t *", text), #text
    elseif ngx.req.get_body_file() then
        bytes, size, release = posix.map(ngx.req.get_body_file())
    end
    local next_member = bytes and members.read(bytes, 0, size, store.breathe)
    local values, from, to, err = {}, nil, nil, nil
    if next_member then
        local name, begins, ends
        repeat
            name, begins, ends = next_member()
            if name == large then
                from, to = begins, ends
            elseif name then
                values[name], err = json.decode(ffi_string(bytes + begins, ends - begins))
            else
                err = begins
            end
        until not name or err
    end
    if not next_member or err then
        return answer.refuse(400, "bad_json", "the body is not a JSON object"
                             .. (err and ": " .. err or ""))
    end
    return values, { bytes = bytes, text = text, from = from, to = to, release = release }
end


-- The upstreams of a push, one after the other, as `store.apply` asks for them: after the first
-- fault there are none, and all others are looked for faults as well.
-- @param where as `read_members` gives it
-- @param push `{errors, unsupported, names}`: what is found in them is added
local function upstreams_of(where, push)
    local bytes = where.bytes
    local errors, names = push.errors, push.names
    local next_member = members.read(bytes, where.from, where.to, store.breathe)

    local function read(name, begins, ends)
        if names[name] then
            errors[#errors + 1] = { upstream = name, field = "name", message = "is there twice" }
            return nil
        end
        names[name] = true
        local item, err = json.decode(ffi_string(bytes + begins, ends - begins))
        if item == nil then
            push.malformed = err
            return nil
        end
        return wire.read_upstream(name, item, errors, push.unsupported)
    end

    return function()
        while #errors < MAX_ERRORS and not push.malformed do
            local name, begins, ends = next_member()
            if not name then
                push.malformed = begins
                return nil
            end
            local upstream = read(name, begins, ends)
            if #errors == 0 and not push.malformed then
                return name, upstream
            end
            store.breathe()
        end
        return nil
    end
end


local function read_removed(body, push)
    if body.remove == nil then
        return
    end
    local names, err = wire.read_names(body.remove)
    if not names then
        push.errors[#push.errors + 1] = { field = "remove", message = err }
        return
    end
    push.remove = names
end


-- Faults that show only when all upstreams have been read.
local function check_removed(push)
    for _, name in ipairs(push.remove) do
        if push.names[name] then
            push.errors[#push.errors + 1] = {
                upstream = name, field = "remove", message = "is in upsert too",
            }
        end
    end
    return #push.errors == 0 and not push.malformed
end


local function refuse_push(push)
    if push.malformed then
        return answer.refuse(400, "bad_json", "the body is not a JSON object: " .. push.malformed)
    end
    return answer.invalid(push.errors)
end


--- Reads the body of a push; answers and gives nil where it is no object.
-- @param full all that is to be held (PUT), not a change of it (PATCH)
-- @return the small members of the body, and for `apply` where its upstreams are
function _M.read(full)
    return read_members(field_of(full))
end


--- Checks and applies a push that `read` has read, and answers.
function _M.apply(full, body, where)
    local field = field_of(full)
    local errors, unsupported = {}, {}
    local push = {
        errors = errors,
        unsupported = unsupported,
        names = {},
        remove = {},
        writer = body.writer,
        revision = body.revision,
        base_revision = not full and body.base_revision or nil,
    }
    if not wire.is_revision(body.revision) or body.revision == 0 then
        errors[1] = { field = "revision", message = "expected a whole number above 0" }
    end
    if not full and not wire.is_revision(body.base_revision) then
        errors[#errors + 1] = { field = "base_revision", message = "expected a whole number" }
    end
    if not where.from and not full then
        push.next = function() end
    elseif where.from and members.read(where.bytes, where.from, where.to, store.breathe) then
        push.next = upstreams_of(where, push)
    else
        errors[#errors + 1] = { field = field, message = "expected an object of upstreams" }
        push.next = function() end
    end
    if not full then
        read_removed(body, push)
    end
    push.complete = function()
        return check_removed(push)
    end
    if #errors > 0 then
        push.next()
        return refuse_push(push)
    end

    local result, refusal = store.apply(push)
    if where.release then
        where.release()
    end
    if not result then
        if refusal.kind == "incomplete" then
            return refuse_push(push)
        elseif refusal.kind == "busy" then
            return answer.busy()
        elseif refusal.kind == "revision" then
            return answer.refuse(409, "revision", "the current revision is " .. refusal.revision,
                                 { revision = refusal.revision })
        end
        return answer.refuse(507, "dict_full", "the shared dict has no room for this push; raise "
                             .. "TIDEGATE_DICT_SIZE", {
            free_bytes = refusal.free_bytes, needed_bytes = refusal.needed_bytes,
        })
    end
    probe.start(result.probing)
    persist.schedule()
    -- Before the answer: an upstream of the same name that comes next is another one.
    records.forget(result.removed_names)
    answer.send(200, {
        revision = result.revision,
        upserted = result.upserted,
        removed = result.removed,
        unsupported = sorted(unsupported),
    })
    ngx.eof()
    metrics.forget(result.removed_names)
end


return _M
